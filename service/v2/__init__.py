"""The Open Inference Protocol (V2) over REST, as the clients of Triton and KServe speak it."""
