"""Real data, offline by default: digits from scikit-learn, text from the running Python's own standard library.

Every data set is indexed as a whole: `batch(indices, device)` gives a dict of tensors, with "target" among them. Order,
epochs and the position in an epoch belong to the training loop, which can therefore resume in the middle of one.
"""

from models.data.documents import PAD, Documents, Tokenizer, docstrings, labelled_file
from models.data.errors import DataError
from models.data.images import Images, cifar10, digits
from models.data.text import ByteWindows, standard_library, text_folder

__all__ = [
    "PAD",
    "ByteWindows",
    "DataError",
    "Documents",
    "Images",
    "Tokenizer",
    "cifar10",
    "digits",
    "docstrings",
    "labelled_file",
    "standard_library",
    "text_folder",
]
