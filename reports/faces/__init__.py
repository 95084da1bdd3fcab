"""Other faces of a record: for a pull request, a code-scanning page, a spreadsheet, a model card, a bill of materials.

    from reports.faces.registry import FACES, write_faces

    text = FACES["sarif"].render(record)
    write_faces(record, "markdown,sarif", Path("OUT"))

Each face is a pure function from a record to text, one file a face. The same record gives the same bytes: no clock,
no random identifier, nothing that depends on the machine. No torch is imported.
"""
