"""The training tasks: what is trained, on what data, and what a run leaves behind."""
