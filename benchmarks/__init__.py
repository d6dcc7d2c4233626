"""What the package is compared with: one module per comparison, all in one table.

    python -m benchmarks --help

Every module has ``compare``, which gives its rows of the table, and more behind its own options
(``python -m benchmarks.profile --help``).
"""
