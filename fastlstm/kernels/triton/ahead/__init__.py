"""Triton's kernels, compiled when the wheel is built and started by C++: no Triton is needed then.

``python -m fastlstm.kernels.triton.ahead build`` compiles them (``keys.py``: which; ``build.py``),
``manifest.py`` reads what was compiled, ``library.py`` hands it to ``csrc/triton/``, which starts
it. ``plans.py`` is what ``config.py`` would answer, as a table.
"""
