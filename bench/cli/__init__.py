"""The commands of `python -m bench`, one file each: add_arguments(parser) and run(arguments) -> exit code."""
