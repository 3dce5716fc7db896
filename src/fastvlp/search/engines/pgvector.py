"""An index kept by PostgreSQL with pgvector: a table of ids, vectors and info, with its stamp as the table's comment.

Of rows with equal vectors (the same `same`) one is in the graph; the others are its copies (`vector_keys`).

Many processes may read and write at once; how it is replicated or distributed is the server's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from urllib.parse import urldefrag

import numpy as np

from fastvlp.errors import UserError, install
from fastvlp.search.addresses import shown
from fastvlp.search.calibration import FIELD as CALIBRATION
from fastvlp.search.calibration import Calibration
from fastvlp.search.checks import EngineError, Scalar
from fastvlp.search.engines.interface import Hit, IndexEngine, Item, Stamp, checked_stamp, vector_keys

TABLE = re.compile(r"[a-z_][a-z0-9_]{0,49}")
# Candidates of the graph (HNSW) for each search; it goes on where a filter leaves too few, to at most so many rows.
CANDIDATES, SCANNED = 128, 100_000
# Numbers of a vector that the graph takes: in fp32, and in half precision.
WIDEST, WIDEST_HALF = 2_000, 4_000


class PgIndex(IndexEngine):
    """An address is as libpq takes it; `#name` at its end names the table, `fastvlp` where there is none."""

    prefixes = ("postgresql://", "postgres://")
    address = "postgresql://USER@HOST/DATABASE#TABLE with pgvector"
    # PostgreSQL reads vectors of more than 2 kB from another table.
    small = 2**23

    def __init__(self, uri: str, stamp: Stamp | None = None, create: bool = False):
        self._place, name = urldefrag(uri)
        # For errors, without the password.
        self.uri = shown(uri)
        if not TABLE.fullmatch(name or "fastvlp"):
            raise UserError(f"{self.uri}: {name!r} names no table; take small letters, digits and _, such as #photos")
        self._table = name or "fastvlp"
        self._connect(create)
        with self._engine_errors():
            if create and stamp is not None:
                self._make(stamp)
            fields = self._fields()
        self.stamp = checked_stamp(fields, stamp, self.uri)
        self._type = _column_type(self.stamp.width)
        with self._engine_errors():
            self._upgrade()

    def _connect(self, create: bool = False) -> None:
        try:
            import psycopg
            from pgvector.psycopg import register_vector
        except ImportError as error:
            raise UserError(f"an index in PostgreSQL needs its client: {install('pg')}") from error
        try:
            self._connection = psycopg.connect(self._place, autocommit=True, connect_timeout=10)
            if create:
                self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            elif not self._one("SELECT to_regclass(%s) IS NOT NULL", self._table):
                raise EngineError(f"{self.uri}: no index here; make one with `vlp index build`")
            register_vector(self._connection)
            for setting, value in (("ef_search", CANDIDATES), ("max_scan_tuples", SCANNED)):
                self._connection.execute(f"SET hnsw.{setting} = {value}")
            self._connection.execute("SET hnsw.iterative_scan = strict_order")
        except psycopg.Error as error:
            raise EngineError(
                f"{self.uri}: {str(error).splitlines()[0]}; is PostgreSQL running there, with pgvector 0.8 or newer?"
            ) from error

    def _make(self, stamp: Stamp) -> None:
        table, type = self._table, _column_type(stamp.width)
        with self._alone():
            if self._one("SELECT to_regclass(%s) IS NOT NULL", table):
                return
            self._connection.execute(
                f"CREATE TABLE {table} (id text PRIMARY KEY, vector vector({stamp.width}) NOT NULL, info jsonb NOT NULL, "
                f"same text NOT NULL, copy boolean NOT NULL)"
            )
            self._make_graph(type)
            self._connection.execute(f"CREATE INDEX ON {table} USING gin (info jsonb_path_ops)")
            self._comment(asdict(stamp))

    def _comment(self, fields: Mapping[str, Any]) -> None:
        quoted = json.dumps(fields).replace("'", "''")
        self._connection.execute(f"COMMENT ON TABLE {self._table} IS '{quoted}'")

    def _fields(self) -> dict[str, Any] | None:
        return _json_object(self._one("SELECT obj_description(%s::regclass, 'pg_class')", self._table))

    def calibration(self) -> Calibration | None:
        with self._engine_errors():
            return Calibration.read(self._fields())

    def calibrate(self, calibration: Calibration) -> bool:
        with self._engine_errors(), self._alone():
            self._comment({**(self._fields() or {}), CALIBRATION: calibration.to_json()})
        return True

    def _make_graph(self, type: str) -> None:
        self._connection.execute(
            f"CREATE INDEX ON {self._table} USING hnsw ((vector::{type}) {type.partition('(')[0]}_ip_ops) "
            f"WITH (m = 24, ef_construction = 128) WHERE NOT copy"
        )
        self._connection.execute(f"CREATE INDEX ON {self._table} (same)")

    def _upgrade(self) -> None:
        """Gives a table of before there were copies its new columns. Its rows stay in the graph, each by itself."""
        columns = "SELECT count(*) FROM pg_attribute WHERE attrelid = %s::regclass AND attname IN ('same', 'copy')"
        if self._one(columns, self._table) == 2:
            return
        with self._alone():
            if self._one(columns, self._table) == 2:
                return
            old = (
                "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = %s::regclass AND indexprs IS NOT NULL"
            )
            for (name,) in self._connection.execute(old, (self._table,)).fetchall():
                self._connection.execute(f"DROP INDEX {name}")
            self._connection.execute(
                f"ALTER TABLE {self._table} ADD COLUMN same text NOT NULL DEFAULT gen_random_uuid()::text, "
                f"ADD COLUMN copy boolean NOT NULL DEFAULT false"
            )
            self._make_graph(self._type)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A transaction; where two begin one at once, the second waits and finds what the first did."""
        with self._connection.transaction():
            self._connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (self._table,))
            yield

    def _one(self, query: str, *values: Any) -> Any:
        row = self._connection.execute(query, values).fetchone()
        return row[0] if row else None

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        import psycopg

        if self._connection.closed:
            self._connect()
        try:
            yield
        except psycopg.Error as error:
            raise EngineError(f"{self.uri}: {type(error).__name__}: {str(error).splitlines()[0]}") from error

    def _add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        keys = vector_keys(vectors)
        rows = [
            (id, vector, json.dumps(dict(info)), key, key) for id, vector, info, key in zip(ids, vectors, infos, keys)
        ]
        with self._engine_errors(), self._alone(), self._connection.cursor() as cursor:
            left = self._taken_out(ids)
            cursor.executemany(
                f"INSERT INTO {self._table} (id, vector, info, same, copy) VALUES (%s, %s, %s, %s, "
                f"EXISTS (SELECT 1 FROM {self._table} WHERE same = %s AND NOT copy))",
                rows,
            )
            self._hand_over(left)

    def _delete(self, ids: Sequence[str]) -> int:
        with self._engine_errors(), self._alone():
            left = self._taken_out(ids)
            self._hand_over(left)
        return len(left)

    def _taken_out(self, ids: Sequence[str]) -> list[str]:
        """Deletes rows, and returns which vector each had."""
        query = f"DELETE FROM {self._table} WHERE id = ANY(%s) RETURNING same"
        return [same for (same,) in self._connection.execute(query, (list(ids),)).fetchall()]

    def _hand_over(self, keys: Sequence[str]) -> None:
        """Puts a copy of each vector that is not in the graph any more into the graph."""
        self._connection.execute(
            f"UPDATE {self._table} SET copy = false WHERE id IN "
            f"(SELECT min(id) FROM {self._table} WHERE same = ANY(%s) GROUP BY same HAVING bool_and(copy))",
            (list({*keys}),),
        )

    def _search(
        self, vectors: np.ndarray, k: int, offset: int, where: Mapping[str, Sequence[Scalar]]
    ) -> list[list[Hit]]:
        condition = "".join(" AND (" + " OR ".join(["one.info @> %s"] * len(values)) + ")" for values in where.values())
        wanted = [json.dumps({name: value}) for name, values in where.items() for value in values]
        page = "ORDER BY score DESC, one.id LIMIT %s OFFSET %s"
        exact = f"SELECT one.id, -(one.vector <#> %s) AS score, one.info FROM {self._table} one WHERE true{condition} {page}"
        # The nearest in the graph of which a copy, or they themselves, fit; then all that are equal to those.
        fitting = (
            f" AND EXISTS (SELECT 1 FROM {self._table} one WHERE one.same = node.same{condition})" if where else ""
        )
        graph = (
            f"WITH near AS MATERIALIZED (SELECT node.same FROM {self._table} node WHERE NOT node.copy{fitting} "
            f"ORDER BY node.vector::{self._type} <#> %s::{self._type} LIMIT %s) "
            f"SELECT one.id, -(one.vector <#> %s) AS score, one.info FROM near JOIN {self._table} one USING (same) "
            f"WHERE true{condition} {page}"
        )
        with self._engine_errors():
            most = self.small // self.stamp.width
            few = self._one(f"SELECT count(*) FROM (SELECT FROM {self._table} LIMIT %s) found", most + 1) <= most
            answers = [
                self._connection.execute(
                    exact if few else graph,
                    (row, *wanted, k, offset) if few else (*wanted, row, k + offset, row, *wanted, k, offset),
                ).fetchall()
                for row in vectors
            ]
        return [[Hit(id, float(score), info) for id, score, info in answer] for answer in answers]

    def count(self) -> int:
        with self._engine_errors():
            return int(self._one(f"SELECT count(*) FROM {self._table}"))

    def _get(self, ids: Sequence[str]) -> Iterable[Item]:
        with self._engine_errors():
            query = f"SELECT id, vector, info FROM {self._table} WHERE id = ANY(%s)"
            rows = self._connection.execute(query, (list(ids),)).fetchall()
        return [Item(id, np.asarray(_numbers(vector), np.float32), info) for id, vector, info in rows]

    def close(self) -> None:
        self._connection.close()


def _numbers(vector: Any) -> Any:
    """Returns an array of what the client gives: releases differ, it is an array or an object that has one."""
    return vector.to_numpy() if hasattr(vector, "to_numpy") else vector


def _column_type(width: int) -> str:
    """Returns the type of vectors in the graph: pgvector's `vector`, or its half precision, which takes more numbers. The
    graph ranks by them; scores are of the whole vectors. Raises UserError for vectors that are too wide for it."""
    if width > WIDEST_HALF:
        raise UserError(
            f"vectors of {width} dimensions: pgvector's index takes at most {WIDEST_HALF}; keep the index in a folder, or "
            f"export a model with a narrower embed.width"
        )
    return f"{'vector' if width <= WIDEST else 'halfvec'}({width})"


def _json_object(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
