"""What a run's log shows: `lbw-report` draws it on one page, `diagnose` says it in a sentence.

`reading` and `columns` take in what is on the disk, `diagnosis` and `words` say what happened,
`charts` and `page` draw it.
"""

from lbw_optax.report.command import report
from lbw_optax.report.diagnosis import Alarm, Diagnosis, Finding, diagnose

__all__ = ["Alarm", "Diagnosis", "Finding", "diagnose", "report"]
