"""Faces of a record: the HTML report, the terminal summary, and what later joins them.

    from audit.record import Record
    from reports.html import write_report

    write_report(Record.read(Path("OUT")), Path("OUT/report.html"))

Everything here is a pure function of `audit.record.Record`: the same record gives the same bytes, no model is
opened, and neither torch nor transformers is imported.

- `words`: numbers, outcomes and verdicts in plain words; every face says the same thing with them
- `escape`: the one place that makes text from a model or a data file safe to show
- `forest`: an estimate, its interval and its threshold as one drawn row
- `plots`: a finding's figure as SVG
- `methods`: what each instrument does and cannot tell, for a reader who is no engineer
- `html`: the self-contained report
- `text`: the summary that a terminal prints
- `comparable`, `comparison`, `diff`: two records side by side; `diff_html`, `diff_text`: its faces
- `faces`: Markdown, SARIF, CSV, a model card, an ML-BOM; `mapping`: findings by what legal texts ask
- `attestation`, `signing`: whether anything of an audit was altered, and who says so
- `policy_text`: how a policy was met; `commands`: what the command line does with finished audits
"""
