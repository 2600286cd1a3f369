"""The CPU's ops compiled by numba: the reference's integers, its floats to rounding, in a fraction of its time.

A kernel reads one KV head of one block of tokens. Blocks lie at multiples of a constant, so neither the number of
threads nor what else is asked changes how anything is summed.
"""
