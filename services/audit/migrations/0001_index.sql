-- The index of audit. {int} holds 64 bits, {key} is a primary key of them,
-- {bytes} are bytes: the one place that says what a database calls them is
-- dialect.go. Times are nanoseconds since 1970 UTC. Nothing here is evidence:
-- all of it follows from log and payloads, and can be made again from them.

CREATE TABLE block (
	height   {key},
	time     {int} NOT NULL,
	first    {int} NOT NULL, -- leaf index of the block's first leaf
	size     {int} NOT NULL, -- of the log after the block
	hash     {bytes} NOT NULL, -- of the header
	root     {bytes} NOT NULL
);
CREATE UNIQUE INDEX block_size ON block (size);

-- One row for each record's leaf. state says whether its payload is there: held,
-- gone, redacted; of the others nothing but their place is known.
CREATE TABLE record (
	idx      {key},
	height   {int} NOT NULL,
	state    TEXT NOT NULL,
	kind     TEXT NOT NULL,
	class    TEXT NOT NULL, -- of retention
	junction TEXT,
	device   TEXT,
	signer   TEXT,          -- type and id in the registry of the block
	boot     {int} NOT NULL, -- of a frame; the run of an import; 0: none
	seq      {int} NOT NULL, -- 0: none
	measured {int} NOT NULL, -- by the signer's clock; the block's time where the record has none
	rule     TEXT
);
CREATE INDEX record_junction ON record (junction, measured, idx) WHERE junction IS NOT NULL;
CREATE INDEX record_measured ON record (measured, idx);
CREATE INDEX record_device ON record (device, boot, seq, idx) WHERE device IS NOT NULL;
-- Frames and commands are nearly all there is; the rest is looked for by kind.
CREATE INDEX record_rare ON record (kind, measured, idx) WHERE kind <> 'frame' AND kind <> 'command';
CREATE INDEX record_absent ON record (state, idx) WHERE state <> 'held';

CREATE TABLE command (
	idx                {key},
	junction           TEXT NOT NULL,
	seq                {int} NOT NULL,
	issued             {int} NOT NULL,
	stage              {int} NOT NULL,
	rests_height       {int} NOT NULL,
	rests_device       TEXT NOT NULL,
	rests_boot         {int} NOT NULL,
	rests_seq          {int} NOT NULL,
	policy             TEXT NOT NULL,
	policy_version     TEXT NOT NULL,
	controller         TEXT NOT NULL,
	controller_version TEXT NOT NULL
);
CREATE INDEX command_seq ON command (junction, seq);
CREATE INDEX command_policy ON command (policy, policy_version, issued, idx);

-- What a frame says became of commands.
CREATE TABLE outcome (
	junction TEXT NOT NULL,
	command  {int} NOT NULL,
	idx      {int} NOT NULL, -- of the frame
	applied  {int} NOT NULL, -- 1 or 0
	reason   TEXT,
	PRIMARY KEY (junction, command, idx)
);
CREATE INDEX outcome_frame ON outcome (idx);

-- Who asked, and for which case.
CREATE TABLE matter (
	idx         {key},
	measured    {int} NOT NULL,
	requester   TEXT,
	case_number TEXT
);
CREATE INDEX matter_requester ON matter (requester, measured, idx) WHERE requester IS NOT NULL;
CREATE INDEX matter_case ON matter (case_number, measured, idx) WHERE case_number IS NOT NULL;

-- Up to which block everything that redactions and receipts of deletion name is
-- out of the index: one row, or none.
CREATE TABLE reconciled (
	height {int} NOT NULL
);
