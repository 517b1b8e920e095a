"""Replacing C functions of CuPy's compiled modules by Python functions.

CuPy's modules find each other's C functions in `__pyx_capi__`, a dict of capsules, each a pointer whose name is the
C type, such as "intptr_t (size_t, int __pyx_skip_dispatch)". They look there when they are imported: put another
pointer there before, and they call it. The pointers are to small C functions, generated here, which call a Python
function and hand on its result, or its exception, which a callback made by ctypes could not.
"""

import atexit
import ctypes
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import building

# How an argument of each C type becomes a Python object (see PyObject_CallFunction). Others, which are options that
# CuPy itself leaves at their defaults (structs), and the flag of Cython's own, are not handed on.
FORMATS = {
    **dict.fromkeys(("int", "cudaMemcpyKind", "CUdevice"), "i"),
    **dict.fromkeys(("size_t", "uintmax_t"), "k"),
    **{"unsigned int": "I", "intptr_t": "n", "PyObject *": "O"},
}
# How a Python object becomes a result of each C type, and what to return with an exception: CuPy's declarations say
# which value (`except? -1`) makes it look for one.
RESULTS = {
    "int": ("(int)PyLong_AsLong(result)", "-1"),
    "intptr_t": ("PyLong_AsSsize_t(result)", "0"),
    "size_t": ("PyLong_AsUnsignedLong(result)", "-1"),
    "unsigned int": ("(unsigned)PyLong_AsUnsignedLong(result)", "0"),
    "uintmax_t": ("PyLong_AsUnsignedLong(result)", "0"),
    "float": ("(float)PyFloat_AsDouble(result)", "0"),
}
ERROR_VALUES = {"funcGetAttribute": "-2", "streamGetPriority": "0"}
KEPT = {"check_status", "runtimeGetVersion", "_getCUDAMajorVersion", "get_build_version"}  # need no device

PRELUDE = """
#include <stdint.h>
#include <stddef.h>
typedef struct PyObject PyObject;
typedef int cudaMemcpyKind;
typedef int CUdevice;
PyObject *PyObject_CallFunction(PyObject *, const char *, ...);
long PyLong_AsLong(PyObject *);
unsigned long PyLong_AsUnsignedLong(PyObject *);
intptr_t PyLong_AsSsize_t(PyObject *);
double PyFloat_AsDouble(PyObject *);
void Py_DecRef(PyObject *);
void Py_IncRef(PyObject *);
PyObject *none;
int finished;  /* the interpreter is shutting down: do nothing more */
"""

_python = ctypes.pythonapi
_python.PyCapsule_GetName.restype = ctypes.c_char_p
_python.PyCapsule_GetName.argtypes = [ctypes.py_object]
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_kept_alive: list[Any] = []  # C holds these without counting references


def replace(modules: list[ModuleType], functions: dict[str, Callable]) -> None:
    """Replace what `modules` offer to C and to Python by `functions`, the rest by what raises NotImplementedError."""
    source, replacements = [PRELUDE], []
    for module in modules:
        for name, capsule in module.__pyx_capi__.items():
            signature = _python.PyCapsule_GetName(capsule).decode()
            if (code := trampoline(name, signature)) and name not in KEPT:
                source.append(code)
                replacements.append((module, name, signature.encode(), functions.get(name) or unsupported(name)))
    library = ctypes.PyDLL(str(building.shared_library("gcc", "".join(source), ".c", ("-O1", "-w"))))
    ctypes.c_void_p.in_dll(library, "none").value = id(None)
    for module, name, signature, function in replacements:
        ctypes.c_void_p.in_dll(library, f"handler_{name}").value = id(function)
        address = ctypes.cast(getattr(library, f"call_{name}"), ctypes.c_void_p)
        module.__pyx_capi__[name] = _python.PyCapsule_New(address, signature, None)
        setattr(module, name, function)
        _kept_alive.append((signature, function))
    _python.Py_IncRef(ctypes.py_object(_kept_alive))
    atexit.register(setattr, ctypes.c_int.in_dll(library, "finished"), "value", 1)


def unsupported(name: str) -> Callable:
    def function(*arguments: object) -> None:
        raise NotImplementedError(f"cuda_on_cpu does not imitate {name}")

    return function


def trampoline(name: str, signature: str) -> str | None:
    """Return C code of a function of the given type which calls a Python function; None where that can't be."""
    matched = re.fullmatch(r"(.*?) ?\((.*)\)", signature)
    if matched is None:  # a variable
        return None
    result_type, listed = matched.groups()
    returns_object = result_type == "PyObject *" or re.fullmatch(r"struct __pyx_obj_\w+ \*", result_type)
    if not returns_object and result_type not in RESULTS:  # a struct of CUDA's
        return None
    declared, passed, formats = [], [], ""
    for index, argument in enumerate(listed.split(", ")):
        if argument == "void":
            continue
        c_type = argument.replace(" __pyx_skip_dispatch", "")
        if c_type in FORMATS and c_type == argument:
            passed.append(f", a{index}")
            formats += FORMATS[c_type]
        declared.append(f"{c_type if c_type in FORMATS else 'void *'} a{index}")
    convert, error = ("", "NULL") if returns_object else RESULTS[result_type]
    if returns_object:
        at_exit, finish = "{ Py_IncRef(none); return none; }", "return result;"
    else:
        at_exit, finish = "return 0;", f"{result_type} value = {convert}; Py_DecRef(result); return value;"
    return f"""
PyObject *handler_{name};
{"PyObject *" if returns_object else result_type} call_{name}({", ".join(declared) or "void"}) {{
    if (finished) {at_exit}
    PyObject *result = PyObject_CallFunction(handler_{name}, "({formats})"{"".join(passed)});
    if (!result) return {ERROR_VALUES.get(name, error)};
    {finish}
}}
"""
