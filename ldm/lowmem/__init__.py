"""Exact encoding and decoding in slabs, within a given memory."""
