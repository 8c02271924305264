// Package ledger turns agreed blocks of records into a line of history that
// outsiders check with their own tools.
//
// Every accepted record becomes one Merkle leaf; a [Checkpoint] commits to all
// leaves so far and is cosigned by a quorum of validators: then it is sealed.
// Anyone who holds two checkpoints can ask for a proof that the later one only
// appended. A [Bundle] proves single records to someone who holds nothing but a
// [Policy]: [VerifyBundle]. [Fsck] checks a whole data folder.
//
// Nothing here talks to a network, a disk or a clock: callers supply a
// [TileReader], an [io/fs.FS], bytes, times.
//
// What follows is meant to suffice for another implementation. ‖ joins bytes,
// integers are big-endian where nothing else is said, SHA-256 is FIPS 180-4,
// Ed25519 is RFC 8032, and trees are those of RFC 6962 §2.1: a leaf is hashed as
// SHA-256(00 ‖ entry), a node as SHA-256(01 ‖ left ‖ right).
//
// # Commitment and leaf
//
// A record is an envelope (package identity) and a 32-byte salt drawn at random
// when it was taken in.
//
//	commitment = SHA-256("stopline commitment v1\n" ‖ salt ‖ envelope)
//	leaf       = version 01 ‖ class ‖ 32 bytes
//
// Class 01 is a record, with its commitment. Class 00 is the first leaf of every
// block, with the hash of the header of the block before, and, for block 1, with
// the SHA-256 of the genesis document. The 34 bytes are the log's entry. Without
// the salt nobody can test a guess of the content: let go of envelope and salt,
// and what is left says nothing.
//
// # Block, header, vote
//
// Block h appends to the log its class 00 leaf and then one class 01 leaf for
// each record that the validators accepted, in the order of its batches. A header
// is
//
//	"stopline header v1\n"
//	height, time (Unix nanoseconds), previous size, size, registry version: 5 × 64 bits
//	genesis, parent, root, leaves, verdicts, requests, registry: 7 × 32 bytes
//
// with the meanings given at [Header]; its hash is the SHA-256 of that. A vote is
// an Ed25519 signature, checked by ZIP 215, over
//
//	"stopline vote v1\n" ‖ header hash ‖ SHA-256(metadata)
//
// where metadata are bytes of the consensus engine that come with the votes. Of n
// validators f = ⌊(n−1)/3⌋ may be faulty, and q = ⌈(n+f+1)/2⌉ must vote.
//
// Header h is in the log as soon as block h+1 is: its leaf has index size(h).
//
// # Tiles
//
// The log is laid out as C2SP tlog-tiles (https://c2sp.org/tlog-tiles): hash tiles
// of height 8 at tile/<level>/<n>, entry bundles at tile/entries/<n>, each entry
// with a 16-bit length before it, partial ones with .p/<width>. See [TileID].
//
// # Checkpoint, cosignature, policy
//
// A checkpoint is a signed note (https://c2sp.org/signed-note) with the three
// lines of https://c2sp.org/tlog-checkpoint: origin, size, root in base64. It is
// signed with the log's Ed25519 key, whose name is the origin, and cosigned
// (https://c2sp.org/tlog-cosignature, cosignature/v1) by validators with keys
// apart from those they vote with, named <origin>/validator-<number>.
//
// Whose signatures are needed says a policy file, https://c2sp.org/tlog-policy:
//
//	log <vkey>
//	witness <name> <vkey>            for each validator
//	group validators <q> <name>...
//	quorum validators
//
// and, where neighbouring districts must have cosigned too, in the place of the
// last line
//
//	witness <name> <vkey> <url>      for each neighbour
//	group neighbours <k> <name>...
//	group district all validators neighbours
//	quorum district
//
// [ParsePolicy] says what it refuses beyond the specification. A checkpoint that
// meets the policy is sealed. Everything under it existed no later than the
// (f+1)-th smallest time among the cosignatures that count.
//
// When the validators change, others take the place of the group validators, and
// the rest of the policy stays. A checkpoint is for those who decided the last of
// its blocks: the one after the block that changed them is cosigned by those before,
// every later one by those after. Who pinned genesis and the first policy follows
// the changes through a [SuccessionProof], which the log serves as /succession.
//
// # Evidence bundle
//
// A bundle is a ZIP archive in the one form that its content allows: every file
// stored, not compressed; in the order below; version needed and made by 10, all
// flags, times, attributes, disks and extra fields zero, the date 1980-01-01 (33);
// no comment, nothing before, between or behind. Whatever differs is refused, so
// that nothing is in the archive that was not verified.
//
//	bundle.json                  {"format": "stopline evidence v1", "files": [{"name", "sha256"}…]}
//	                             of all files that follow, indented by one space, newline at the end
//	statement.txt                what the bundle says, for people; it follows from the other files
//	checkpoint                   the sealed checkpoint
//	policy                       whose signatures are needed, as the maker says: a hint only
//	succession/genesis           only where the validators are not the first any more: the genesis
//	                             document
//	succession/steps             a [SuccessionProof], as its Marshal writes it
//	succession/proof             tlog-proof of leaf 0, under a checkpoint that the first validators
//	                             have cosigned
//	unbroken.json                only where stretches of frames are claimed to be whole: a list of
//	                             {"device", "boot_epoch", "from", "to"}, indented by one space, newline
//	                             at the end, by device, boot epoch and from, each once, from < to
//	blocks/<height>/header       for each block with records in the bundle, by height
//	blocks/<height>/votes        32-bit length ‖ metadata, then the votes as in [MarshalVotes]
//	blocks/<height>/proof        tlog-proof of the leaf that commits to the header
//	blocks/<height>/registry/<i> JSON of [identity.Excerpt], by index i in the registry's order
//	records/<index>/envelope     for each record, by leaf index
//	records/<index>/salt         32 bytes
//	records/<index>/proof        tlog-proof of the record's leaf
//
// Of a record whose content was let go, by redaction or because its time was over,
// only its leaf is left:
//
//	records/<index>/tombstone    the 34 bytes of the leaf, in the place of envelope and salt
//
// Proofs are of https://c2sp.org/tlog-proof, without extra data, each with the
// same checkpoint. Numbers are decimal without leading zeros. At most 64 MiB and
// 4096 records.
//
// To verify a bundle:
//
//  1. The checkpoint meets the policy that the verifier trusts. Or else, where there
//     is a succession: the checkpoint of succession/proof does; under it leaf 0 is
//     01 00 ‖ SHA-256(genesis document); the steps verify from that document on; and
//     the checkpoint meets the policy of the set that they say was in force at its
//     size, in which later validators have the place of the first.
//  2. For each block, the leaf 01 00 ‖ SHA-256(header) is at index size(header) of
//     the checkpoint's tree.
//  3. Every registry excerpt leads to the header's registry hash. They are the
//     signers' entries, all validators' entries, whose indexes follow one another,
//     and the entries right before the first and right after the last validator,
//     where the registry does not end there: so no validator was left out. An entry
//     is "stopline registry entry v1\n", then type, id, status and since, each with
//     a newline, then the body in JSON.
//  4. All votes are valid, by different validators that are active, and at least q.
//  5. For each record, the leaf of its commitment is at its index, between the
//     header's previous size (not included) and size; its signer's entry is active
//     and may sign its kind; the envelope's signature is valid. Of a tombstone only
//     the leaf is at its index: it proves that there was a record, not what it said.
//  6. For each stretch in unbroken.json, the bundle holds exactly one frame of that
//     device and boot epoch for each sequence from the first to the last; and the
//     prev of each but the first is the SHA-256 of the payload of the one before.
//
// The statement is for people; this implementation takes only the one that it
// makes itself of the same content, so that it cannot claim anything else.
//
// Without a trusted policy the bundle's own is used, and the outcome is at best
// [Untrusted]: anybody can make a district.
//
// # Accusation
//
// Proof that validators broke the protocol is one JSON document, [Accusation],
// indented by one space, a newline at the end; any other form is refused, and
// nothing is in it that no signature covers. Its kind says what it holds:
//
//	votes        two heads of messages between validators, see [Message], signed with
//	             one vote key, for one set of members, view, height and phase, with
//	             different digests. Votes of different views never are evidence.
//	blocks       two headers of one height, each with its metadata and the votes of a
//	             quorum. Who voted for both in one view is guilty; in two views the
//	             fork is proven, and nobody's guilt.
//	checkpoints  two signed notes of one log, of one size with different roots, or of
//	             two sizes with different leaves at one index, each with its proof; or
//	             of two sizes with a consistency proof to the larger's root from another
//	             root than the smaller's
//
// Where the validators are not those of genesis any more, members shows how they
// came to be: for each change the header of its block with the votes of a quorum
// of those before, and the agreed record with its inclusion proof to the header's
// root, [Step]. Votes name the block since which their set is in force, and the
// last step must be that block; what somebody says who is not of that set counts
// for nothing. Blocks show their set in the registry of their headers, too.
//
// Bytes are in base64, the genesis hash in hex, and the two are in the order of
// their bytes. Vote keys are in the genesis document, which the verifier must trust,
// cosigners' in it and in the policy: [Trust], [Accusation.Judge].
//
// # Files of the data folder
//
// Journals and the payload store are in the form of package segment; their
// records are [Decided], [SealedAt] and [Payload]. services/sealing says where
// they are.
package ledger
