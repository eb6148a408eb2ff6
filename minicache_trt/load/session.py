"""One call of the load generator, from a server's address to the points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from minicache_trt.errors import UserError
from minicache_trt.load.apis import APIS, Sampling
from minicache_trt.load.discovery import ASSUMED_TOKENS_PER_WORD, check_answers, find_model, parse_url, probe
from minicache_trt.load.exchange import Endpoint
from minicache_trt.load.generator import open_client
from minicache_trt.load.loads import WARM_UP, Sweep
from minicache_trt.load.metrics import Point
from minicache_trt.load.slo import Slo
from minicache_trt.load.sources import SourceOptions, open_source
from minicache_trt.load.sweep import run_sweep
from minicache_trt.load.text import MeasuredText, TextMaker, open_tokenizer


@dataclass(frozen=True)
class Server:
    """Where the load goes.

    Parameters
    ----------
    url : str
        Root, with or without ``/v1``.
    api : str
        A key of `minicache_trt.load.apis.APIS`.
    model : str, optional
        Default: the first one the server names (not with Triton).
    path : str, optional
        Instead of the API's own.
    headers : mapping
        Of every request.
    timeout : float
        Seconds a request may take.
    sampling : Sampling
    tokenizer : str, optional
        Directory or hub id.
    """

    url: str
    api: str = "openai"
    model: str | None = None
    path: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 600.0
    sampling: Sampling = field(default_factory=Sampling)
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise ValueError(f"api: expected one of {', '.join(APIS)}, got {self.api}")
        if not self.timeout > 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {self.timeout}")


@dataclass(frozen=True)
class Session:
    """What was measured: on which endpoint, with which requests, how prompts were cut to size, and the points."""

    endpoint: Endpoint
    source: str
    lengths: str
    points: tuple[Point, ...]


async def measure(
    server: Server,
    options: SourceOptions,
    sweep: Sweep,
    slo: Slo | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Session:
    """Find out what is there, make requests for it and measure.

    Raises
    ------
    UserError
        Nobody answers, the first requests fail, or a file or tokenizer cannot be used.
    """
    url = parse_url(server.url)
    text: TextMaker | None = open_tokenizer(server.tokenizer) if server.tokenizer else None
    if text is not None or options.dataset_path is not None:
        open_source(options, text or MeasuredText(ASSUMED_TOKENS_PER_WORD), sweep.seed)  # whatever is wrong, say it now
    async with open_client() as client:
        if server.model is not None:
            await check_answers(client, url, dict(server.headers))
        elif server.api == "triton":
            raise UserError(
                "--api triton needs --model", "such as ensemble, or the repository's own name for the model"
            )
        model = server.model or await find_model(client, url, dict(server.headers))
        endpoint = Endpoint(
            url, APIS[server.api], model, server.sampling, server.timeout, server.headers, server.path
        )  # fmt: skip
        counted = await probe(client, endpoint, sweep.generator(WARM_UP))
        lengths = "tokenizer" if text else "server" if counted else "words"
        text = text or counted or MeasuredText(ASSUMED_TOKENS_PER_WORD)
        source = open_source(options, text, sweep.seed)
        points = [point async for point in run_sweep(client, endpoint, source, sweep, slo, progress)]
    return Session(endpoint, source.name, lengths, tuple(points))
