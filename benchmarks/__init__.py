"""How fast perdure is, against what the machine can do and what others do, in the same run.

python -m benchmarks --help
"""
