"""From a call of a function or module to the operators of a backend, and back through autograd.

In the order in which a call travels: ``stack`` checks it and walks through its layers,
``autograd`` gives a layer its derivatives, ``compute`` calls the operators. ``fast_path`` is a
short cut.
"""
