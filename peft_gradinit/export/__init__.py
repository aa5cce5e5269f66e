"""Adapters written for PEFT and for servers, and merged models."""

from .adapter import ExportReport, ExportTarget, check_export, export_adapter
from .places import check_directory
