"""Fail unless tests about a framework ran: python check_ran.py REPORT.xml WORD.

A broken installation turns tests into skipped ones and would look green. At least one test with the word in its name
must have run, and none may have been skipped for a reason that names it.
"""

import sys
import xml.etree.ElementTree as ElementTree

report, word = sys.argv[1:]
ran, missed = 0, []
for case in ElementTree.parse(report).getroot().iter("testcase"):
    name = f"{case.get('classname')}::{case.get('name')}"
    skipped = case.find("skipped")
    if skipped is None:
        ran += word in name
        continue
    # A module skipped as a whole carries its reason in the text, a test in the attribute; paths are no reason.
    reason = (skipped.text or "").partition("Skipped: ")[2] or skipped.get("message", "")
    if word in reason:
        missed.append(f"{name}: {reason}")
print(f"{word}: {ran} tests ran, {len(missed)} skipped for want of it", *missed, sep="\n  ")
if missed or not ran:
    sys.exit(f"expected at least one test of {word} to run, and none to be skipped for want of it")
