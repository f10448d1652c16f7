"""Exact encoding and decoding in slabs, within a given memory.

slabwise  the budget, its plan, and the sweeps through a network
slabs     nodes, rows and sweeps
lazy      tensors that note what is to be computed
"""
