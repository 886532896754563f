"""What all gRPC clients and servers share."""
