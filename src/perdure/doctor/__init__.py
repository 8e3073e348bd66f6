"""Doctor of training: rules that detect known challenges, and remedies for them."""

from perdure.doctor.finding import Finding, Level, Remedy
from perdure.doctor.rules.base import Rule

__all__ = ["Finding", "Level", "Remedy", "Rule"]
