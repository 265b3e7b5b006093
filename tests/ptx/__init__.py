"""An emulator of PTX: kernels compiled for sm_80 and sm_90 compute on CPU tensors, in numpy.

A kernel becomes a Python function, an instruction a few lines of it. All threads of a block go in
lockstep, a register is an array with an entry for each thread; a branch of nvcc's may divide them.
What the hardware would not forgive is a :class:`~ptx.faults.Fault`: an access outside of a tensor,
a misaligned one, a deadlock, an instruction that the emulator does not know. Races are collected.

| file | content |
|---|---|
| `parse.py`, `translate.py`, `instruction.py` | from text to a Python function |
| `integers.py`, `floats.py`, `conversions.py`, `control.py` | opcodes that work on registers |
| `data_movement.py`, `matrices.py`, `messages.py` | opcodes that reach memory or other threads |
| `arithmetic.py` | rounding, and the errors of approximations |
| `memory.py`, `shared.py`, `races.py` | address spaces, and who has touched them |
| `banks.py` | how often accesses of shared memory meet in a bank |
| `flow.py` | where each thread is, while a branch divides a block |
| `copies.py`, `products.py`, `cluster.py` | what copies, products and clusters do |
| `execute.py` | all blocks of a launch |
| `backend.py`, `cuda.py` | the Triton and the CUDA backend of fastlstm through the emulator |

`tests/README.md` says what it proves and what it cannot see.
"""
