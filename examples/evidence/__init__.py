"""Experiments that ask what coupling does on data, beside what people use instead: see README.md."""
