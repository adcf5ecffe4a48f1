"""Triton kernels. Nothing here is imported where none can run.

All of them take and give strided tensors, write nothing but what they return, add up in single
precision in a fixed order, without atomics, and so give the same bits every time. Offsets are 64
bits wide.
"""
