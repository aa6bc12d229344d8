"""Where the guard's metrics and alerts go: files, dashboards, pagers. On the host, all optional.

- `names`: the names that dashboards know the metrics by.
- `lines`: metrics as JSON Lines, which `lbw-watch` and `lbw-report` read.
- `prometheus`: metrics as a text file for Prometheus.
- `webhook`: alerts to a URL, on a thread of its own.
- `trackers`: alerts to trackio and to W&B.
"""

from lbw_optax.exporters.lines import MetricsLog
from lbw_optax.exporters.names import NAMES, Name, grouped, tag
from lbw_optax.exporters.prometheus import PrometheusFile
from lbw_optax.exporters.trackers import trackio_alert, wandb_alert
from lbw_optax.exporters.webhook import Webhook

__all__ = [
    "NAMES",
    "MetricsLog",
    "Name",
    "PrometheusFile",
    "Webhook",
    "grouped",
    "tag",
    "trackio_alert",
    "wandb_alert",
]
