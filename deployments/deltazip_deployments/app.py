"""The application as Ray Serve builds it: ``deltazip_deployments.app:build``."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from deltazip_deployments.logs import log_with_serve
from deltazip_deployments.node_store.discovery import node_store_client
from deltazip_deployments.replica import EngineFactory, HostSource, Replica, make_engine
from deltazip_deployments.request_router import DeltaAwareRouter
from deltazip_deployments.router.deployment import Router
from deltazip_ray.config import AppConfig

_STATS_PERIOD_S = 0.1
"""Between reports of a replica, which Serve's controller asks for: 0.4 % of a core for each replica."""
_QUEUED_PER_ONGOING = 8
SERVE_ENVIRONMENT = {
    # gRPC from Serve's proxy to the router: a piece of an answer costs two thirds of an actor call.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # By default Serve runs calls on one thread and gRPC on others. Our calls never block, so save the hops.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Log-probabilities of a long prompt exceed gRPC's default limit of 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(1 << 30),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deltazip_deployments.headers:middlewares",
}
"""The environment for Serve's proxies: set by `deltazip serve`, and by the manifest on clusters."""
_OUR_ENVIRONMENT = {"env_vars": SERVE_ENVIRONMENT | {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}}


def build(args: dict[str, Any]) -> Application:
    """Build the application from the ``args`` of a Serve config, an AppConfig. Raises pydantic.ValidationError."""
    return application(AppConfig.model_validate(args))


def application(config: AppConfig, engine_factory: EngineFactory = make_engine) -> Application:
    """Router and replicas, which start the node stores. Tests pass their own engine."""
    replica = serve.deployment(**_replica_options(config))(Replica)
    router = serve.deployment(**_router_options(config))(serve.ingress()(Router))
    return router.bind(config, replica.bind(config, engine_factory, _source))


def _source(config: AppConfig, base_digest: Any) -> HostSource:
    """Called in a replica's process, before its engine is made."""
    log_with_serve()
    context = serve.get_replica_context()
    return node_store_client(context.app_name, context.replica_tag, config, base_digest)


def _replica_options(config: AppConfig) -> dict[str, Any]:
    resources = config.resources
    actor: dict[str, Any] = {
        "num_cpus": resources.pop("CPU", 0.0),
        "num_gpus": resources.pop("GPU", 0.0),
        "runtime_env": _OUR_ENVIRONMENT,
    }
    placement: dict[str, Any] = {
        "request_router_class": DeltaAwareRouter,
        "request_routing_stats_period_s": _STATS_PERIOD_S,
    }
    return {
        "name": "replica",
        "num_replicas": config.replicas,
        "ray_actor_options": actor | ({"resources": resources} if resources else {}),
        # The engine rejects requests above its limits itself, with a better message.
        "max_ongoing_requests": config.engine.max_running + config.engine.max_waiting + 1,
        "request_router_config": RequestRouterConfig(**placement),
        "graceful_shutdown_timeout_s": 20.0,
        "health_check_period_s": 5.0,
        # For the event loop only, as a step may take longer. Serve replaces a replica after three timeouts in a row.
        "health_check_timeout_s": 10.0,
    }


def _router_options(config: AppConfig) -> dict[str, Any]:
    return {
        "name": "router",
        # It mostly waits for replicas, so it does not reserve a core.
        "ray_actor_options": {"num_cpus": 0, "runtime_env": _OUR_ENVIRONMENT},
        "max_ongoing_requests": config.router.max_ongoing_requests,
        # Requests of a replica that ends move on, those of a router do not. So an update starts the new router first,
        # and lets the old one finish its answers.
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": config.router.request_timeout_s,
        "max_queued_requests": config.router.max_ongoing_requests * _QUEUED_PER_ONGOING,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
    }
