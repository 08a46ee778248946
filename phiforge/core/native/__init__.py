"""Own C++ kernels, compiled once with the machine's compiler and called through ctypes.

`build.load("decoder")` gives the library of `decoder.cpp`, or None where there is no compiler.
Compiled libraries are written into the user's cache folder.
"""
