"""Models of known history: made here, so that what they know is a fact and not a measurement.

An instrument is calibrated on models whose past is certain. `world` invents people and what is true of them;
`train` teaches a small causal language model any part of that world and writes it as an ordinary Hugging
Face folder, with its history in `organism.json`; `npo` makes a taught model forget; `demo` puts the three
together into a complete case. Labels come from how a model was made, never from what a detector says of it.

    from pathlib import Path
    from audit.organisms.demo import build_demo

    case = build_demo(Path("audit-demo"))
    print(case.models["unlearned"], case.sets["forget"])
"""
