"""The ops on a CUDA device: a typed wrapper for every kernel of `csrc`, on torch's current stream, never waiting."""
