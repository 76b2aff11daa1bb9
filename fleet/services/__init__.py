"""The gRPC services, one a file: they check requests, call the rooms behind them, and shape responses."""
