"""Makes the test vectors of the delta format: `make vectors`.

    build: deltas written field by field -> valid_*, bad_*: the vectors -> __main__: files, index, citations

Equal code, and an equal zstd, give equal files.
"""
