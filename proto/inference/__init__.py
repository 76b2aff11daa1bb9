"""The Open Inference Protocol (KServe v2): generated stubs."""
