"""What serving costs: a load of requests, ways of batching them, and the latencies that clients see."""

from lightning_efficient.dissect.serving.batching import (
    Batching,
    ContinuousBatching,
    Decoder,
    ServingRun,
    StaticBatching,
    serve,
)
from lightning_efficient.dissect.serving.load import (
    Arrivals,
    Burst,
    ClosedLoop,
    Poisson,
    Request,
    check_requests,
    synthetic_requests,
)
from lightning_efficient.dissect.serving.metrics import (
    CdfPoint,
    Percentiles,
    RequestTimes,
    ServingReport,
    ServingResult,
    cdf,
)

__all__ = [
    "Arrivals",
    "Batching",
    "Burst",
    "CdfPoint",
    "ClosedLoop",
    "ContinuousBatching",
    "Decoder",
    "Percentiles",
    "Poisson",
    "Request",
    "RequestTimes",
    "ServingReport",
    "ServingResult",
    "ServingRun",
    "StaticBatching",
    "cdf",
    "check_requests",
    "serve",
    "synthetic_requests",
]
