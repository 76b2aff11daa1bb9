"""Fuzzing of the delta decoder: `make fuzz`.

    choices: bytes as decisions -> deltas, programs: a delta with right checksums -> examine: decode it

An input is a string of choices, not a delta: so any bytes lead through the checksums to the layer that they
choose, whatever the format of the day. `corpus/inputs.txt` keeps inputs, one a line in hex, that together
reach what was reached so far; the tests replay it. What was found wrong becomes a test vector.
"""
