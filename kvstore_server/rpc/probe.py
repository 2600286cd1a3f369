"""Is a server SERVING? For container and load-balancer probes."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def is_serving(
    target: str, timeout_seconds: float, ca_pem: bytes | None = None, server_name: str | None = None
) -> bool:
    """One grpc.health.v1 Check of the whole server, over TLS if its CA is given."""
    if ca_pem is None:
        opened = grpc.insecure_channel(target)
    else:
        options = [("grpc.ssl_target_name_override", server_name)] if server_name else None
        opened = grpc.secure_channel(target, grpc.ssl_channel_credentials(ca_pem), options)
    with opened as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)  # type: ignore[attr-defined]
        except grpc.RpcError:
            return False
    return reply.status == health_pb2.HealthCheckResponse.SERVING
