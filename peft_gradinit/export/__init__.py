"""Adapters written for PEFT and for servers, and merged models."""

from .adapter import ExportReport, ExportTarget, check_directory, export_adapter
