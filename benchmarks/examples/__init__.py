"""Small complete programs that use fastlstm: ``python -m benchmarks.examples.NAME``."""
