"""Names that Ray keeps private, in one place: each Ray version may move them."""

from ray._private import worker as _worker
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled as ensure_token_if_auth_enabled,
)
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS as DEBUG_AUTOSCALING_STATUS
from ray._private.ray_constants import PROCESS_TYPE_MONITOR
from ray._private.services import canonicalize_bootstrap_address as canonicalize_bootstrap_address
from ray._private.services import get_webui_url_from_internal_kv as get_webui_url_from_internal_kv
from ray._raylet import GcsClient as GcsClient  # type: ignore[attr-defined]
from ray.experimental import internal_kv as internal_kv


def stop_autoscaler() -> None:
    """End the autoscaler of the cluster that this process has started.

    One machine has nothing to scale, and `ray.shutdown` waits a second for this process.
    """
    for started in _worker._global_node.all_processes.get(PROCESS_TYPE_MONITOR, ()):
        started.process.kill()
        started.process.wait()
