"""A few documents, and the JSONL line of each, for tests of reading and tokenizing."""

import json

DOCUMENTS = [
    "The cat sat on the mat.",
    "Two lines,\nof one document.",
    "naïve café 猫 🐈",
    "<mask> is <s>plain</s> text",
]
WORDS = "the sea is grey and a boat comes home late from far away islands "


def jsonl(documents):
    return "".join(json.dumps({"id": 1, "text": document}) + "\n" for document in documents).encode()


# Sentences to make texts of words from: polytonic Greek (Odyssey 1, Iliad 1), Hindi, Arabic with all vowels, English
GREEK = (
    "ἄνδρα μοι ἔννεπε μοῦσα πολύτροπον ὃς μάλα πολλὰ πλάγχθη ἐπεὶ Τροίης ἱερὸν πτολίεθρον ἔπερσεν πολλῶν δ ἀνθρώπων "
    "ἴδεν ἄστεα καὶ νόον ἔγνω πολλὰ δ ὅ γ ἐν πόντῳ πάθεν ἄλγεα ὃν κατὰ θυμόν ἀρνύμενος ἥν τε ψυχὴν καὶ νόστον ἑταίρων "
    "ἀλλ οὐδ ὣς ἑτάρους ἐρρύσατο ἱέμενός περ μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος οὐλομένην ἣ μυρί Ἀχαιοῖς ἄλγε ἔθηκε"
)
HINDI = (
    "यह एक छोटा लड़का है जो हर सुबह नदी के किनारे जाता है और पेड़ों पर बैठी चिड़ियों को देखता है उसकी माँ घर में रोटी बनाती है "
    "और पिता खेतों में काम करते हैं शाम को सब लोग मिलकर खाना खाते हैं फिर दादी पुरानी कहानियाँ सुनाती हैं बच्चे ध्यान से सुनते हैं"
)
ARABIC = (
    "ذَهَبَ الوَلَدُ إِلَى المَدْرَسَةِ فِي الصَّبَاحِ وَكَتَبَ الدَّرْسَ ثُمَّ رَجَعَ إِلَى البَيْتِ وَأَكَلَ الخُبْزَ مَعَ أُمِّهِ وَأَبِيهِ "
    "وَقَرَأَ كِتَابًا جَمِيلًا عَنِ البَحْرِ وَالسَّمَاءِ وَالنُّجُومِ ثُمَّ نَامَ اللَّيْلَ كُلَّهُ فِي غُرْفَتِهِ"
)
ENGLISH = (
    "The cook paints a red boat in the morning, and a neighbour quietly repairs the broken clock of the old house; "
    "then they walk along the river with three children, who haven't seen so many birds before, and talk about it."
)
