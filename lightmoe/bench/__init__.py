"""`lightmoe bench`: batch sizes x prompt lengths, against a server or in process.

sweep.py says what to measure, targets.py runs it, measure.py makes one row of it, straggler.py
names who was waited for, report.py and figure.py write it down, command.py is all in order.
"""
