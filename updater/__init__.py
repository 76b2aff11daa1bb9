"""updater: a version becomes a delta, and a delta a version again.

Format readers find tensors in model files (`formats/`), the encoder and the streaming applier turn one file
into another (`delta/`), and files live in a content-addressed store (`store.py`) under manifests
(`manifest.py`). This room imports nothing of ours but the stubs; agent and fleet both build on it.
"""
