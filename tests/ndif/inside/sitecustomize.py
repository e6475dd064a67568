# nnsight mounts `.save` on `object`; anyio must have defined its classes before that, or request bodies above 1 MiB are refused.
import anyio._backends._asyncio
import anyio.streams.stapled
import anyio.streams.tls  # noqa: F401
