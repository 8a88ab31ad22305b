"""The CPU kernel: C++ generated from a spec, compiled on the user's machine."""
