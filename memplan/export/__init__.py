"""A plan in the words of what runs it: arguments of Hugging Face's trainers, Python to be pasted, a loop of one's own.

Reads plans as plain data (`memplan.report.document.plan_document`) or setups, and writes text.
"""
