"""What a caller of the public API shows to a gateway: an API key, a certificate, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from hocket.errors import WrongConfig
from hocket.security.identity import Identity, Options, open_channel


@dataclass(frozen=True)
class Credentials:
    """How a caller reaches gateways. The default is a plain connection without a key."""

    api_key: str = ""
    tls_ca: Path | None = None  # checks the gateway's certificate against its host
    tls_dir: Path | None = None  # a folder of `hocket certs`: shows a certificate as well

    def channel(
        self,
        address: str,
        options: Options,
        interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    ) -> grpc.aio.Channel:
        """A channel to a gateway. Raises WrongConfig where a file cannot be read."""
        keyed = [*interceptors, *_with_key(self.api_key)]
        if self.tls_ca is not None and self.tls_dir is None:
            try:
                trusted = grpc.ssl_channel_credentials(self.tls_ca.read_bytes())
            except OSError as error:
                allowed = f"a file of certificates ({error.strerror})"
                raise WrongConfig("tls_ca", str(self.tls_ca), allowed) from None
            return grpc.aio.secure_channel(address, trusted, options=options, interceptors=keyed)
        return open_channel(address, options, Identity.load(self.tls_dir), "gateway", keyed)


def _with_key(key: str) -> Sequence[grpc.aio.ClientInterceptor]:
    return (_KeyOnUnary(key), _KeyOnStream(key), _KeyOnUpload(key)) if key else ()


def _keyed(details: grpc.aio.ClientCallDetails, key: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("x-api-key", key)
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


class _KeyOnUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, key: str) -> None:
        self._key = key

    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        return await continuation(_keyed(client_call_details, self._key), request)


class _KeyOnStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, key: str) -> None:
        self._key = key

    async def intercept_unary_stream(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        return await continuation(_keyed(client_call_details, self._key), request)


class _KeyOnUpload(grpc.aio.StreamUnaryClientInterceptor):
    def __init__(self, key: str) -> None:
        self._key = key

    async def intercept_stream_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        return await continuation(_keyed(client_call_details, self._key), request_iterator)
