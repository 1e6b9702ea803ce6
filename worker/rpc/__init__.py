"""The Open Inference Protocol over gRPC, for Triton's gRPC clients; the extra `serve-grpc`."""
