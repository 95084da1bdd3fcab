"""Palimpsest's engine: from a model folder to a record of what it still knows.

Data flows one way, and every step is a module:

    folder -> inventory -> target -> capture -> evidence -> instrument -> finding -> verdict -> record -> report

- `case`, `loaders`, `readers`, `presets`, `pictures`: what is audited, and with which example sets
- `inventory`, `disguises`, `configuration`: what lies in a model folder, and whether it is safe to open (without torch)
- `opened`, `target`, `image_target`, `tokens`: the opened model; texts, and images, as sequences
- `plan`, `passes`, `capture`, `quantities`: instruments' requests merged into the fewest passes, and those passes
- `evidence`: captures on disk, found by content; what makes a scan resumable
- `instrument`: the contract of a detector, probe or attack, and the registry
- `contrast`, `controls`, `statistics`: the never-taught comparison, and every interval and test
- `verdict`, `record`, `scan`: findings judged, the schema of the result, and the whole put together
- `organisms`: models of known history

`audit` knows no instrument by name: `detectors/`, `probes/` and `attacks/` are found through the registry, and
`reports/` knows only `audit.record`.
"""
