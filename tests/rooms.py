"""The import-linter contract type `rooms`: the table of rooms in pyproject.toml, held to the letter."""

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class RoomsContract(Contract):
    """Every module imports only what the row of its room allows, itself, and the standard library.

    Options:
        package: the package whose children are the rooms.
        facade: what `package/__init__.py` itself may import.
        rooms: one row per room, `name: allowed allowed ...`; an allowed name is another room or an external package.

    Imports are checked one by one, so an arrow is allowed only by its own row. Rows of absent rooms are idle; a room
    without a row is reported.
    """

    type_name = "rooms"

    package = fields.StringField()
    facade = fields.StringField()
    rooms = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        package = str(self.package)
        rows = {package: set(str(self.facade).split())}
        for row in self.rooms:  # type: ignore[attr-defined]
            name, _, allowed = row.partition(":")
            rows[f"{package}.{name.strip()}"] = set(allowed.split())

        problems = [f"{room} has no row" for room in sorted(graph.find_children(package) - set(rows))]
        for room in sorted(set(rows) & graph.modules):
            inside = {room} if room == package else {room} | graph.find_descendants(room)
            for importer in sorted(inside):
                for imported in sorted(graph.find_modules_directly_imported_by(importer) - inside):
                    target = self._room_of(imported, package)
                    if target not in rows[room] and target not in sys.stdlib_module_names:
                        details = graph.get_import_details(importer=importer, imported=imported)
                        lines = ", ".join(sorted({str(detail["line_number"]) for detail in details}))
                        problems.append(f"{importer} imports {imported} (line {lines}): not in the row of {room}")
        return ContractCheck(kept=not problems, metadata={"problems": problems})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for problem in check.metadata["problems"]:
            output.print_error(f"- {problem}", bold=False)

    @staticmethod
    def _room_of(module: str, package: str) -> str:
        """The name a row uses: the room inside the package, or the top of an external package."""
        parts = module.split(".")
        return parts[1] if parts[0] == package and len(parts) > 1 else parts[0]
