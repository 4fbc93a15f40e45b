"""Triton's CPU interpreter, mended and without its largest waste; importing this before triton is enough."""

from fastops._library import after_import


def splat_of_booleans(interpreter):
    """The interpreter spreads the result of comparing two scalars as an integer, which 3.9 refuses as a mask."""
    spread = interpreter.InterpreterBuilder.create_splat

    def create_splat(builder, type_, argument):
        if argument.data.dtype == bool:
            argument = interpreter.TensorHandle(argument.data, interpreter.tl.int1)
        return spread(builder, type_, argument)

    interpreter.InterpreterBuilder.create_splat = create_splat


def numbers_before_nan(interpreter):
    """tl.minimum and tl.maximum give the other number beside a NaN, as on a GPU, unless they are asked to spread it."""

    def create_minnumf(builder, left, right):
        return builder.binary_op(left, right, interpreter.np.fmin)

    def create_maxnumf(builder, left, right):
        return builder.binary_op(left, right, interpreter.np.fmax)

    interpreter.InterpreterBuilder.create_minnumf = create_minnumf
    interpreter.InterpreterBuilder.create_maxnumf = create_maxnumf


def patch_once(interpreter):
    """A call of one @triton.jit function by another replaces the functions of triton.language, which they are already.

    Looking for what is left to replace was a third of the time of a kernel.
    """
    tl, patch = interpreter.tl, interpreter._patch_lang

    def patch_lang(function):
        languages = {id(value): value for value in function.__globals__.values() if value is tl or value is tl.core}
        if languages and not any(tl.core.is_builtin(one.load) for one in languages.values()):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_lang


def mend(interpreter):
    splat_of_booleans(interpreter)
    numbers_before_nan(interpreter)
    patch_once(interpreter)


after_import("triton.runtime.interpreter", mend)
