"""What a run says: the rows of its folder, written and read by the same code, and its events.

A row is a frozen dataclass. In a JSON file it is one mapping, in which its metrics stand beside its
other fields, those named like a field in a mapping `metrics`; a file of its own carries `format`
too.
"""

from selfkd.results.capacity import CapacitySummary as CapacitySummary
from selfkd.results.capacity import SearchesOfSizes as SearchesOfSizes
from selfkd.results.capacity import SearchOfSize as SearchOfSize
from selfkd.results.capacity import Seeds as Seeds
from selfkd.results.capacity import Size as Size
from selfkd.results.ensemble import Chosen as Chosen
from selfkd.results.ensemble import EnsembleSummary as EnsembleSummary
from selfkd.results.ensemble import Member as Member
from selfkd.results.ensemble import Members as Members
from selfkd.results.ensemble import Parts as Parts
from selfkd.results.ensemble import SourceResult as SourceResult
from selfkd.results.ensemble import TableRow as TableRow
from selfkd.results.ensemble import TeacherRow as TeacherRow
from selfkd.results.evaluation import Biases as Biases
from selfkd.results.evaluation import Bin as Bin
from selfkd.results.evaluation import Confusion as Confusion
from selfkd.results.evaluation import Diagnostics as Diagnostics
from selfkd.results.evaluation import Evaluation as Evaluation
from selfkd.results.evaluation import Example as Example
from selfkd.results.evaluation import Examples as Examples
from selfkd.results.evaluation import McNemar as McNemar
from selfkd.results.evaluation import Unseen as Unseen
from selfkd.results.events import Event as Event
from selfkd.results.events import Events as Events
from selfkd.results.events import GenerationConfirmed as GenerationConfirmed
from selfkd.results.events import GenerationFinished as GenerationFinished
from selfkd.results.events import Message as Message
from selfkd.results.events import RunFinished as RunFinished
from selfkd.results.events import StageStarted as StageStarted
from selfkd.results.events import Summary as Summary
from selfkd.results.events import TaskProgressed as TaskProgressed
from selfkd.results.events import TaskStarted as TaskStarted
from selfkd.results.events import TrialFinished as TrialFinished
from selfkd.results.events import TrialProgressed as TrialProgressed
from selfkd.results.fields import Point as Point
from selfkd.results.generations import Confirmation as Confirmation
from selfkd.results.generations import ControlResult as ControlResult
from selfkd.results.generations import GenerationResult as GenerationResult
from selfkd.results.generations import GenerationsSummary as GenerationsSummary
from selfkd.results.generations import Origin as Origin
from selfkd.results.generations import Replicated as Replicated
from selfkd.results.generations import best_generation as best_generation
from selfkd.results.metrics import Metric as Metric
from selfkd.results.metrics import Mode as Mode
from selfkd.results.metrics import find_metric as find_metric
from selfkd.results.metrics import title as title
from selfkd.results.row import CHECKPOINT as CHECKPOINT
from selfkd.results.row import FORMAT as FORMAT
from selfkd.results.row import OWN as OWN
from selfkd.results.row import STUDENT as STUDENT
from selfkd.results.row import Interval as Interval
from selfkd.results.row import Measured as Measured
from selfkd.results.row import Row as Row
from selfkd.results.row import from_row as from_row
from selfkd.results.row import to_row as to_row
from selfkd.results.study import ArmResult as ArmResult
from selfkd.results.study import ArmRun as ArmRun
from selfkd.results.study import ContrastResult as ContrastResult
from selfkd.results.study import MembersRow as MembersRow
from selfkd.results.study import StudySummary as StudySummary
from selfkd.results.trial import Epoch as Epoch
from selfkd.results.trial import Facts as Facts
from selfkd.results.trial import Model as Model
from selfkd.results.trial import Trial as Trial
from selfkd.results.trial import TrialResult as TrialResult
from selfkd.results.verdict import Comparison as Comparison
from selfkd.results.verdict import Outcome as Outcome
from selfkd.results.verdict import Verdict as Verdict
