"""Programs: a block's arrays predicted together and their residuals entropy coded under shared models.

    decode: reader -> body, records -> values, predictors -> residuals -> pools -> tables, rans, bits
                   -> skeletons -> bytemodel
    encode: encoder -> pairing, arrange, planner, repeats -> writer

A program says for each array (record) of its block how the base predicts it: equal, quantised, cast, pruned,
scaled by channel, or following from other arrays of the block. What the predictions miss goes into pools, one
for each kind of residual, whose symbols are coded by rANS in contexts that both sides know. The bytes between
the arrays are coded by zstd or a byte model. Rules: arithmetic in integers or in single IEEE 754 operations
that every machine rounds alike; every count is compared with a limit before memory is taken for it.
"""

from updater.delta.program.run import run

__all__ = ["run"]
