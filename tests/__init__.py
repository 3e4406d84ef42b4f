"""The tests: one file per source file, in the same tree; what concerns no one file stays on top."""
