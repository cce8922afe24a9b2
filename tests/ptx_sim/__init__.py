"""Runs what Triton compiles, without a GPU: a driver whose launches go to a simulator of PTX.

Triton's kernels are compiled for sm_90 down to PTX and then run on CPU tensors: the blocks of a
launch one after another, the warps of a block one after another from barrier to barrier, 32 lanes
in lockstep. Each instruction does what PTX says of it, with its one rounding; one that is not in
`instructions.py` is refused by name. What a thread does wrong ends the launch with the instruction
and its place in the Python source: an address outside the tensors that were given or misaligned, a
race or an unwritten byte in shared memory, a lane that misses an exchange of its warp.

It says nothing about time, what ptxas makes of the PTX, the GPU's approximations (ex2.approx is
exp2f here), races in global memory, or the order of warps beyond `Simulator.backwards`. Of shared
memory it does not see that a lane overwrites what another one of its warp has just read, that two
threads write the same value, or that a copy by cp.async, which here happens at its wait, is awaited
too late.

`python -m pytest -p ptx_sim.plugin -k triton FILE` runs existing tests so, with TRITON_INTERPRET=0
and tests/ on PYTHONPATH; tests/test_ptx_sim.py does.
"""
