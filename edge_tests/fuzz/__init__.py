"""Fuzzing of the delta decoder: `make fuzz`.

    choices: a fuzzer's bytes as decisions -> mutate, invent: a delta with right checksums -> examine: decode it

An input is a string of choices, not a delta: so any bytes lead through the checksums to the layer that they
choose, whatever the format of the day. The corpus keeps inputs; what was found wrong becomes a test vector.
"""
